"""Live vLLM engines: the child process that generates, its client and supervisor, the collector of groups."""
