"""A student as files of another runtime, and what that cost: size, latency, memory, and quality against the teacher.

    student folder ─ model.py ─▶ Deployable ─ formats/NAME.py ─▶ FOLDER ─ formats/NAME.py ─▶ Runtime ─ runtime.py

Belongs here: formats, one file each in formats/; what is measured of an exported folder in its own runtime. Does not:
a cache as other programs read it (export), how a student is made or trained (train), measures and pages themselves.
"""
