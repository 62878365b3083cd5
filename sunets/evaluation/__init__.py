"""Scoring of a trained network."""
