"""Recipes that come with quantflow."""
