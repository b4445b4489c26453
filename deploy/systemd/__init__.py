"""systemd units of a run's workers: written from templates, checked by systemd itself.

Invariant: a unit starts a verb that a person could type, stops with everything that it started, and may do no
more on its host than its worker needs.
"""
