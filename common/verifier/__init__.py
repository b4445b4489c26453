from .grade import grade
