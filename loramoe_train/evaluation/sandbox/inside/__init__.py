"""What runs inside the sandbox: `box.py` hands the text of these files to a bare `python -I -S`. Standard library only.

`main` gives up every right that it has, then becomes two processes: `candidate`, which runs the foreign code, and
`judge`, which runs the tests and never a line of that code.
"""
