"""Verbs, screens, chat: the only room that talks to a terminal."""
