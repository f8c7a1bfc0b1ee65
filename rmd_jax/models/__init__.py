"""Policies and reward-model ensembles as Flax Linen modules over plain parameter trees."""
