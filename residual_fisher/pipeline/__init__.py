"""The rooms of compute_fisher.py: settings, prompts, files, scores, pictures."""
