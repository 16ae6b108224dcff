"""Streaming evaluation: how fast, how exact, and in how little memory long texts are read."""
