"""The command line: one file a verb, each with `configure(parser)` and `run(args)`. stdout is data, stderr is talk."""
