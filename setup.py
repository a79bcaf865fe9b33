from pathlib import Path

from setuptools import find_packages, setup

version = next(
    line.split('"')[1]
    for line in Path("ltdd_scale/__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)

setup(
    name="ltdd_scale",
    version=version,
    description="Large-scale distillation of long-tailed image sets",
    long_description=Path("README.md").read_text() if Path("README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["ltdd_scale", "ltdd_scale.*"]),
    package_data={
        "ltdd_scale.publish": ["templates/*"],
        "ltdd_scale.experts": ["deepspeed/*.json"],
    },
    install_requires=[
        "torch>=2.9",
        "torchvision>=0.24",
        "webdataset>=1.0",
        "pyyaml>=6",
        "numpy>=1.26",
        "pillow>=10.1",
        "scikit-learn>=1.4",
        "pydantic>=2.7",
        "jinja2>=3.1",
        "matplotlib>=3.9",
        "scipy>=1.11",
        "pyarrow>=15",
        "safetensors>=0.4",
        "threadpoolctl>=3",
        "markupsafe>=2",
    ],
    extras_require={
        # What a cluster adds; a laptop does without.
        "scale": ["deepspeed>=0.16", "nvidia-dali-cuda130", "submitit>=1.5"],
        "dev": [
            "pytest>=8",
            "axe-playwright-python>=0.1.4",
            "datasets>=3",
            "hypothesis>=6",
            "ruff>=0.8",
            "ty==0.0.107",
            "import-linter>=2.1",
            "playwright>=1.45",
        ],
    },
    entry_points={"console_scripts": ["ltdd-scale=ltdd_scale.cli:console"]},
)
