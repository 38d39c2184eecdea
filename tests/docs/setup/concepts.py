import os
import tempfile

os.chdir(tempfile.mkdtemp())
