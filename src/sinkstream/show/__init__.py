"""Showing: tables for terminal and Markdown, pictures, progress."""
