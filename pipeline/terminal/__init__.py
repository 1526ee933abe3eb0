"""How every script talks and ends: arguments, messages, progress, signals, exit codes."""
