"""Measures a model: its answers, its accuracy, its speed, its layers."""
