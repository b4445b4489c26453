"""What is asked and how it is asked: question sets, prompt templates, and tasks with their rewards."""
