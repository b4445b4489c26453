"""What `slipstream doctor` looks at.

Invariant: an examination changes nothing, ends within its deadline, and each finding says what to do about it.
"""
