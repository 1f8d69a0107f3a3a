"""What several commands take: options of those that run a server (`server`, `guard`) and of those that call one
(`client`, `inputs`), and the types of arguments (`values`).
"""
