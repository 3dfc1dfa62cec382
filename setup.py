"""What pyproject.toml cannot say: an installed package has scripts/ and configs/ too, for the command `ddim`."""

from setuptools import find_packages, setup

FOLDERS = {"ddim_commands.scripts": "scripts", "ddim_commands.configs": "configs"}
setup(packages=[*find_packages(include=["ddim*"]), *FOLDERS], package_dir=FOLDERS)
