"""Make fine-tuned classifiers mergeable: copies of their base, with its head, around the backbone of each.

    python examples/backbones.py CLASS BASE FOLDER MODEL...

mergekit merges models of one architecture tensor by tensor, and classifiers of different tasks have heads of different shapes.
CLASS is a class of transformers that all of the models can be loaded as, such as the one that BASE was trained as. After the
merge, load the merged model's backbone under each task's own head.
"""

import sys
from pathlib import Path

import transformers


def main(architecture: str, base: str, folder: str, *models: str) -> None:
    cls = getattr(transformers, architecture)
    what = transformers.AutoImageProcessor if cls.main_input_name == "pixel_values" else transformers.AutoTokenizer
    processor = what.from_pretrained(base)
    model = cls.from_pretrained(base)
    for name in (base, *models):
        tuned, info = cls.from_pretrained(name, output_loading_info=True)
        inside = {id(parameter) for parameter in tuned.base_model.parameters()}
        if lost := [key for key, value in tuned.named_parameters() if key in info["missing_keys"] and id(value) in inside]:
            sys.exit(f"{name} has no {lost[0]}, so it is no {architecture} below its head")
        model.base_model.load_state_dict(tuned.base_model.state_dict())
        out = Path(folder, name.rstrip("/").rpartition("/")[2])
        model.save_pretrained(out)
        processor.save_pretrained(out)
        print(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
