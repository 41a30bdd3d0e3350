"""Loading models, what is asked of them, and how prompts become rows of tokens that are run."""
