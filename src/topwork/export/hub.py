"""Model folders for the Hugging Face Hub: the model card, upload and download.

``push`` uploads only the files that topwork writes; ``pull`` downloads these files of one commit and verifies them before
they get their final name. The client is huggingface_hub; tokens, proxies and mirrors are its settings.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from topwork.errors import DownloadError, UsageError
from topwork.evaluation.calibration import outcome_sentence, too_few_sentence
from topwork.files import atomic_folder
from topwork.models.classifier import FACTS, KNOWN_FILES, Classifier, find_model, load_classifier
from topwork.text import count, decimal, escape, percent_ci

CARD = """\
---
license: {license}
library_name: {library}
pipeline_tag: image-classification
tags: [image-classification, topwork]
---

# Image classifier for {n_classes} classes

{figures}

- Backbone: {backbone}, weights under {license}.
- Head: {head} parameters.
- Input: {input}.
- Probabilities: calibrated, temperature {temperature:.3f} already in the weights.
- Training data: digest `{digest:.16}`.

## Classes

{classes}
## Use

```
topwork predict THIS_FOLDER photo.jpg
```

## Limits

{limits}
"""


def model_card(classifier: Classifier) -> str:
    """Markdown with the metadata that model hubs read: data, metrics, limitations, license of the weights."""
    provenance, backbone, head = classifier.provenance, classifier.backbone, classifier.head
    spec = backbone.spec
    return CARD.format(
        license=backbone.license or "unknown",
        library="timm" if classifier.is_timm else "topwork",
        n_classes=len(classifier.classes),
        figures=_figures(provenance),
        backbone=f"{backbone.name} ({backbone.architecture})",
        head=f"{head.kind}, {head.weight.size + head.bias.size:,}",
        input=f"{spec.width} x {spec.height} pixels, {spec.fit}, {spec.interpolation}",
        temperature=classifier.temperature,
        digest=str(provenance.get("data_digest", "")),
        classes="".join(
            f"- {_plain(name)}: {n} training images\n" for name, n in provenance.get("n_train", {}).items()
        ),
        limits=_limits(classifier),
    )


def _figures(provenance: dict[str, Any]) -> str:
    figures = provenance.get("figures")
    if not figures:
        return "Not evaluated: there was no held-out part."
    title = "Exact match" if "micro_f1" in figures else "Accuracy"
    clean = ", without images that are also in train" if provenance.get("without_leaks") else ""
    images = count(figures["n"], provenance["judged_on"] + " image")
    said = [f"{title} on {images}{clean}: {percent_ci(figures['accuracy'])}."]
    if "micro_f1" in figures:
        said.append(f"Micro F1 {decimal(figures['micro_f1'])}.")
    return " ".join([*said, outcome_sentence(provenance.get("outcomes"))]).strip()


def _limits(classifier: Classifier) -> str:
    kind = "may give an image any number of them" if classifier.multi_label else "always gives one of them"
    said = [
        f"The model knows only these classes and {kind}.",
        too_few_sentence(classifier.thresholds),
        "The metrics apply to images like those it was trained on; expect lower accuracy with other cameras, places or times.",
    ]
    return " ".join(filter(None, said))


def _plain(name: str) -> str:
    """A class name with Markdown and HTML escaped."""
    return "".join("\\" + c if c in "\\`*_{}[]<>()#+-.!|&" else c for c in escape(name))


@dataclass(frozen=True)
class Pushed:
    """Where a model was uploaded to."""

    url: str
    commit: str


@dataclass(frozen=True)
class Pulled:
    """Where a model was saved, and its commit."""

    folder: Path
    commit: str


def push(
    model: str | os.PathLike[str], repository: str, *, is_private: bool = False, message: str | None = None
) -> Pushed:
    """Verifies and uploads a model folder; creates the repository if needed.

    Raises:
        UsageError: no such model, or an invalid repository name.
        DownloadError: the hub cannot be reached, or denies access.
    """
    folder = find_model(model)
    load_classifier(folder, multi_label=True)
    with _hub(repository, "uploaded") as api:
        api.create_repo(repository, private=is_private, exist_ok=True)
        done = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=[FACTS, *KNOWN_FILES],
            commit_message=message or "Upload with topwork",
        )
        return Pushed(f"{api.endpoint}/{repository}", str(done.oid))


def pull(repository: str, out: str | os.PathLike[str], *, revision: str | None = None) -> Pulled:
    """Downloads a model to a new folder and verifies it.

    Args:
        revision: branch, tag or commit; resolved to a commit before the download.

    Raises:
        UsageError: the folder exists, or an invalid repository name.
        DownloadError: the hub cannot be reached, or there is no such model.
        ModelError: the download is damaged, altered, or not a topwork model.
    """
    folder = Path(out)
    if folder.exists():
        raise UsageError(f"--out {folder}: exists already. Choose another folder.")
    with atomic_folder(folder) as partial:
        with _hub(repository, "downloaded") as api:
            commit = str(api.model_info(repository, revision=revision).sha)
            patterns = [FACTS, *KNOWN_FILES]
            api.snapshot_download(repository, revision=commit, local_dir=partial, allow_patterns=patterns)
        shutil.rmtree(partial / ".cache", ignore_errors=True)  # metadata of the client
        if not (partial / FACTS).is_file():
            raise DownloadError(f"{escape(repository)}: not a topwork model (there is no {FACTS}).")
        load_classifier(partial, multi_label=True)
    return Pulled(folder, commit)


@contextmanager
def _hub(repository: str, done: str) -> Iterator[Any]:
    """The client; its failures become one-line errors."""
    from huggingface_hub import HfApi, errors

    try:
        yield HfApi(library_name="topwork")
    except errors.HFValidationError as error:
        raise UsageError(
            f"{escape(repository)}: not a valid repository name, such as user/insects ({error})."
        ) from None
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
        raise DownloadError(
            f"{escape(repository)}: no such repository or revision, or it is private; log in with: hf auth login."
        ) from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no answer"
        hint = " Log in with: hf auth login." if status in (401, 403) else ""
        raise DownloadError(f"{escape(repository)}: cannot be {done}: the hub answered {status}.{hint}") from None
    # the HTTP library depends on the version of the client
    except (errors.HTTPError, errors.LocalEntryNotFoundError, ConnectionError) as error:  # type: ignore[attr-defined]
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise DownloadError(f"{escape(repository)}: cannot be {done}: the hub cannot be reached ({reason}).") from None
