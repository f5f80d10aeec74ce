"""What a merge tells people: pave_report.json, the section in the model card, and the page with plots."""
