import sys
from pathlib import Path

# The scripted launcher and Workers, which the tests of Main own.
sys.path.insert(0, str(Path(__file__).parents[1] / "main"))
