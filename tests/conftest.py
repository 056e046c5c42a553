"""For every test: an interrupt reaches the processes that tests start.

A shell that starts the tests in the background makes them ignore SIGINT, and ignoring is inherited; a handler is not.
"""

import signal

signal.signal(signal.SIGINT, signal.default_int_handler)
