"""The program of the Python sandbox: it runs in processes of its own and imports nothing else of axpo."""
