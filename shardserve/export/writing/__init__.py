"""From the ranks' graphs to their files: `assemble` gathers what each rank gets, `origins` says what crosses a cut,
`write` puts it on disk.
"""
