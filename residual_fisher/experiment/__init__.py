"""The rooms of core_experiment.py: sentences, perturbations, results, pictures."""
