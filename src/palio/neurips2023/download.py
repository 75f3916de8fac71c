"""Download the published tables of NeurIPS 2023 from its organizers' analysis repository, at one commit."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from palio.errors import PalioError
from palio.provenance import atomic_path, file_sha256

URL = (
    "https://raw.githubusercontent.com/perlitz/llm_efficiency_challenge_nips_paper_analysis/"
    "18d5bbdb73fb53ae5054e5b90a053dc19e73c4d0/results_files/"
)
SHA256 = {
    "4090_open_round_rank.json": "b156e66a84f23caea35419877ef641e7b05e917f7c41f4ff9690ac76b2c396b7",
    "4090_hidden_round_rank.json": "1e75be5ee8b822132e92b905e0cc2ba3508bfbdb766319e2880e1b6d50064277",
    "4090_full_ranks_final_round.json": "12702772b81822187d2c8d7f247730401f6e69a94b992d062904828bacef89e9",
    "A100_open_round_rank.json": "37e40fefc1ba782c36a2122cc8714892d263845539b02b94fe9c3bc0025ba596",
    "A100_hidden_round_rank.json": "e869c8e654d0293ab6d0389228f69e1e6a97f56e21159a8c63b676038119997b",
    "A100_full_ranks_final_round.json": "bb89d2d75733e2e5d975bca80047f3d5ecf258c1a24898590ab133c400e220b2",
}
TIMEOUT_SECONDS = 60


def fetch_published(folder: Path, url: str = URL, files: Mapping[str, str] = SHA256) -> None:
    """Download `files` (name -> sha256) into `folder`, except those that are already there.

    Raises:
        PalioError: a file cannot be downloaded, or is not the published one.
    """
    for name, sha256 in files.items():
        path = folder / name
        if path.exists() and file_sha256(path) == sha256:
            continue
        with atomic_path(path) as temporary:
            try:
                with urllib.request.urlopen(url + name, timeout=TIMEOUT_SECONDS) as response:  # noqa: S310
                    temporary.write_bytes(response.read())
            except (urllib.error.URLError, TimeoutError) as error:
                raise PalioError(f"{url}{name} cannot be downloaded: {error}") from None
            if (digest := file_sha256(temporary)) != sha256:
                raise PalioError(f"{url}{name} has sha256 {digest}, not {sha256}; it is not kept")
