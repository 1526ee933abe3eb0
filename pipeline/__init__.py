"""The pipeline package. Imports go one way: kafka, files -> streaming -> delta -> contract -> spark -> terminal ->
paths; readers use delta and the packages below; dashboard also uses kafka.

Importing any part of it first makes Ctrl+C exit cleanly, which is why the scripts import it before the slower libraries
(pyproject.toml, isort).
"""

import pipeline.terminal.signals  # noqa: F401
