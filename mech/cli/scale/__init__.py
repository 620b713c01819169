"""Beyond one machine, from the command line: ``--ray`` and ``--blocks`` of the commands that measure samples, and the
commands ``mech work`` and ``mech status``.

The options are given to a command by ``spread``; the command itself does not know of them.
"""
