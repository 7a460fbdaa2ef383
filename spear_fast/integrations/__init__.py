"""Other trainers that can run on this project's losses; each module imports its trainer, so none is imported here."""
