"""Beyond one machine, from the command line: ``--ray`` and ``--blocks`` of the commands that measure samples, and the
commands ``mech work`` and ``mech status``.

``spread`` adds the options to a command; the command itself does not know about them.
"""
