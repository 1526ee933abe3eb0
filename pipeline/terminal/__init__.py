"""How scripts communicate and exit: arguments, messages, progress, signals, exit codes."""
