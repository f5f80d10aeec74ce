"""What a merge tells people: pave_report.json and pave_scores.json, sections in the model card, and pages with plots."""
