"""What pyproject.toml can't say: a wheel holds the files of `data/` that ngcore reads, as `ngcore.shipped`."""

from setuptools import find_packages, setup

SHIPPED = {
    "ngcore.shipped": ["README.md", "reported.yaml"],
    "ngcore.shipped.images": ["*"],
    "ngcore.shipped.optimizers": ["*.safetensors"],
}

setup(
    packages=[*find_packages(include=["ngcore*"]), *SHIPPED],
    package_dir={"ngcore.shipped": "data"},
    package_data=SHIPPED,
)
