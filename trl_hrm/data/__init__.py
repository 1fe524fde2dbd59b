"""Build datasets of labelled steps: sources, views, problems, candidates, export of searched trees, publishing."""
