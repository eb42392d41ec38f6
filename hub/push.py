"""`tokenflex push`: publishes a checkpoint with code, card, plots and scores, in one commit."""

import re
from argparse import ArgumentParser
from collections.abc import Iterable, Sequence
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, get_token
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from ..checkpoints.files import replace_directory, write_file
from ..checkpoints.fingerprint import fingerprint_checkpoint, name_differences
from .card import Evaluation, build_card, eval_results_yaml, read_evaluation
from .checkpoint import checkpoint_files


def collect_files(
    checkpoint: str | Path,
    repo_id: str,
    evaluations: Sequence[str | Path] = (),
    eval_task_id: str | None = None,
    **card_options,
) -> dict[str, bytes | Path]:
    """
    Everything that is published, by its path in the repository.

    Args:
        checkpoint (`str` or `Path`): The checkpoint's folder.
        repo_id (`str`): Repository to publish it to.
        evaluations (`Sequence[str | Path]`, *optional*): Folders that `tokenflex eval` wrote.
        eval_task_id (`str`, *optional*):
            If the evaluations are of a benchmark on the Hub, its task in the benchmark's `eval.yaml`: results are then
            written to `.eval_results` as well, from where the Hub shows them on the benchmark's leaderboard.
        card_options: As for [`build_card`].

    Returns:
        `dict[str, bytes | Path]`: The content, or the file that holds it.

    Raises:
        ValueError: If the checkpoint or an evaluation is not whole, or the evaluation is of another checkpoint.
    """
    files = {file.name: file for file in checkpoint_files(checkpoint)}
    read = [read_evaluation(folder) for folder in evaluations]
    titles = [evaluation.slug for evaluation in read]
    if len(set(titles)) < len(titles):
        raise ValueError(f"`evaluation` names the same data twice: {', '.join(titles)}. Give one evaluation of each.")
    if read:
        _refuse_others(read, fingerprint_checkpoint(checkpoint))
    for evaluation in read:
        files |= evaluation.files()
        if eval_task_id is not None:
            files |= {name: text.encode() for name, text in eval_results_yaml(evaluation, eval_task_id).items()}
    files["README.md"] = str(build_card(checkpoint, repo_id, read, **card_options)).encode()
    return files


def _refuse_others(evaluations: Sequence[Evaluation], checkpoint: dict[str, str]) -> None:
    """Refuses scores of another checkpoint than the one that is published."""
    for evaluation in evaluations:
        known = evaluation.report.get("checkpoint", {})
        if differing := name_differences(known, checkpoint):
            raise ValueError(
                f"`evaluation`={str(evaluation.folder)!r} is of another checkpoint, which differs in {differing}: run "
                "`tokenflex eval` on the one that is to be published."
            )


def push_checkpoint(
    checkpoint: str | Path,
    repo_id: str,
    evaluations: Sequence[str | Path] = (),
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Publish the checkpoint",
    token: str | None = None,
    **options,
) -> str:
    """
    Publishes a checkpoint. The commit is one: either all of it is there afterwards or nothing is changed. Weights,
    adapters and evaluations of an earlier push that are not part of this one are removed, and the model card is
    replaced.

    Args:
        checkpoint (`str` or `Path`): The checkpoint's folder.
        repo_id (`str`): Such as `"user/name"`; without a user it is the account's own. It is made if it is not there.
        evaluations (`Sequence[str | Path]`, *optional*): Folders that `tokenflex eval` wrote.
        private (`bool`, *optional*): Whether to make a new repository private. Defaults to the account's setting.
        revision (`str`, *optional*): The branch. Defaults to `"main"`.
        commit_message (`str`, *optional*): The commit's.
        token (`str`, *optional*): Defaults to that of the login, or `HF_TOKEN`.
        options: `eval_task_id` and those of the card, as for [`collect_files`].

    Returns:
        `str`: The commit's URL.

    Raises:
        ValueError:
            If nobody is logged in, the account may not write there, the checkpoint is not whole, the card's metadata
            are not the Hub's, or somebody else has committed meanwhile.
        ConnectionError: If the Hub cannot be reached, or the upload broke off. The message says what is on the Hub.
    """
    checkpoint_files(checkpoint)
    if token is None and get_token() is None:
        raise ValueError("Nobody is logged in: run `hf auth login`, or set HF_TOKEN to a token that may write.")
    api = HfApi(token=token)
    try:
        repo_id = repo_id if "/" in repo_id else f"{api.whoami()['name']}/{repo_id}"
        files = collect_files(checkpoint, repo_id, evaluations, **options)
        ModelCard(files["README.md"].decode()).validate()
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        before = api.model_info(repo_id, revision=revision)
    except HfHubHTTPError as error:
        raise _refusal(repo_id, error) from None
    except ValueError:
        raise
    except Exception as error:  # of whichever HTTP library huggingface_hub uses
        raise ConnectionError(f"The Hub cannot be reached ({error}). Nothing was published.") from error
    stale = [name for name in _stale(file.rfilename for file in before.siblings or []) if name not in files]
    operations = [CommitOperationAdd(name, content) for name, content in files.items()]
    operations += [CommitOperationDelete(name) for name in stale]
    try:
        # Whoever commits at the same time is not overwritten.
        commit = api.create_commit(
            repo_id, operations, commit_message=commit_message, revision=revision, parent_commit=before.sha
        )
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code in (400, 401, 403, 404, 412):
            raise _refusal(repo_id, error) from None
        raise _broken_off(api, repo_id, revision, before.sha, files["README.md"], error) from error
    except Exception as error:
        raise _broken_off(api, repo_id, revision, before.sha, files["README.md"], error) from error
    return commit.commit_url


# Files that a model is loaded from, whoever saved them: left over, they would be taken for part of this one.
LOADED = r"(model|pytorch_model|adapter_model)[\w-]*\.(safetensors|bin)(\.index\.json)?|adapter_config\.json"


def _stale(there: Iterable[str]) -> list[str]:
    """Of the files that are there: weights, and evaluations that this command published."""
    there = list(there)
    slugs = [match[1] for name in there if (match := re.fullmatch(r"evaluation/([^/]+)/results\.json", name))]
    ours = [
        rf"evaluation/{re.escape(slug)}/results\.(json|png)|\.eval_results/{re.escape(slug)}-\w+\.yaml"
        for slug in slugs
    ]
    return [name for name in there if re.fullmatch("|".join([LOADED, *ours]), name)]


def _refusal(repo_id: str, error: HfHubHTTPError) -> Exception:
    status = error.response.status_code if error.response is not None else None
    if status == 401:
        return ValueError(
            "The Hub does not know the token: run `hf auth login`, or set HF_TOKEN to one that may write."
        )
    if status in (403, 404) or isinstance(error, RepositoryNotFoundError):
        return ValueError(
            f"`repo_id`={repo_id!r}: this account may not write there. Take one of your own namespaces (`hf auth "
            "whoami` names them), or a token with write access."
        )
    if status == 412:
        return ValueError(
            f"Nothing was published: somebody has committed to {repo_id} meanwhile. Look at it, then give the command "
            "again."
        )
    if status == 400:
        return ValueError(f"`repo_id`={repo_id!r}: {error.server_message or error}")
    return ConnectionError(f"The Hub did not take the upload ({error}). Nothing was published.")


def _broken_off(
    api: HfApi, repo_id: str, revision: str | None, before: str | None, card: bytes, error: Exception
) -> ConnectionError:
    try:
        now = api.model_info(repo_id, revision=revision).sha
        arrived = now != before and Path(api.hf_hub_download(repo_id, "README.md", revision=now)).read_bytes() == card
    except Exception:
        there = f"Whether it was published could not be found out; if it was, {repo_id} shows a new commit"
    else:
        published = f"It was published all the same, as commit {now}"
        there = published if arrived else f"Nothing was published: the files of {repo_id} are as they were"
    return ConnectionError(f"The upload broke off ({error}). {there}. The same command may be given again.")


def write_folder(folder: str | Path, files: dict[str, bytes | Path]) -> None:
    """
    Writes what would be published.

    Args:
        folder (`str` or `Path`): Folder for them; one that is there is replaced.
        files (`dict[str, bytes | Path]`): Files from [`collect_files`].
    """
    with replace_directory(folder) as new:
        for name, content in files.items():
            write_file(new / name, content if isinstance(content, bytes) else content.read_bytes())


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(prog="tokenflex push", description="Publish a checkpoint on the Hub, with its model card.")
    parser.add_argument("--model_name_or_path", required=True, help="The checkpoint's folder.")
    parser.add_argument("--repo_id", required=True, help="Name of the repository, such as user/name.")
    scores = parser.add_mutually_exclusive_group(required=True)
    scores.add_argument("--evaluation", nargs="+", help="Folders that `tokenflex eval` wrote, for scores and costs.")
    scores.add_argument("--without_evaluation", action="store_true", help="Publish without scores.")
    parser.add_argument(
        "--eval_task_id",
        help="If the evaluations are of a benchmark on the Hub, its task there: results go to .eval_results as well.",
    )
    parser.add_argument("--license", help="The checkpoint's license, such as apache-2.0.")
    parser.add_argument("--language", nargs="+", default=["en"], help="Its languages. Default: %(default)s.")
    parser.add_argument("--dataset", dest="datasets", nargs="+", default=[], help="Hub ids of training data.")
    parser.add_argument("--base_model", nargs="+", default=[], help="Hub ids of what it was built from.")
    parser.add_argument("--tags", nargs="+", default=[], help="Further tags.")
    parser.add_argument("--question", default="What does the picture show?", help="Question of the card's example.")
    parser.add_argument("--private", action="store_true", default=None, help="Make a new repository private.")
    parser.add_argument("--revision", help="The branch. Default: main.")
    parser.add_argument("--commit_message", default="Publish the checkpoint", help="Default: %(default)r.")
    parser.add_argument("--output_dir", help="Write what would be published to this folder instead of publishing it.")
    args = parser.parse_args(argv)
    card = {
        "license": args.license,
        "languages": args.language,
        "datasets": args.datasets,
        "base_models": args.base_model,
        "question": args.question,
        "tags": args.tags,
        "eval_task_id": args.eval_task_id,
    }
    evaluations = args.evaluation or []
    if args.output_dir:
        write_folder(args.output_dir, collect_files(args.model_name_or_path, args.repo_id, evaluations, **card))
        print(f"Written to {args.output_dir}; nothing was published")  # noqa: T201
        return
    options = {name: getattr(args, name) for name in ("private", "revision", "commit_message")}
    url = push_checkpoint(args.model_name_or_path, args.repo_id, evaluations, **options, **card)
    print(f"Published: {url}")  # noqa: T201
