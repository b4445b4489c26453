"""`python -m deploy` is `slipstream`."""

from deploy.cli import main

main()
