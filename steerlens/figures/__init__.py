"""Pictures of tidy frames, and the one-page report. Nothing here runs a model or imports torch."""
