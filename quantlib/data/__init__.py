"""Datasets: their images, found, selected, transformed and decoded."""
