"""What is written about runs and evaluations: ``run`` of a run folder, ``compare`` of several, ``evaluation`` of
``sae-engine eval``. Markdown, and HTML that holds its figures.
"""
