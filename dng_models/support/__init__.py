"""Files, processes, progress and metrics, shared by the other subpackages; no guidance here."""
