"""The ``cogview`` command: one small file per subcommand."""
