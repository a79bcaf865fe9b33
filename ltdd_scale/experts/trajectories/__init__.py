"""Experts whose way through the space of weights is kept: what matching of trajectories follows."""
