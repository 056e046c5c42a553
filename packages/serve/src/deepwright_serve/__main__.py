"""`python -m deepwright_serve MODEL`: the serve command without the rest of deepwright."""

from .command import main

main()
