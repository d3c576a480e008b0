"""`roundel`: the group of commands, and how errors reach the user.

Exit codes: 0 done; 1 any other error; 2 the command or recipe makes no sense; 3 the recipe does not fit the model; 4
the output cannot be written; 5 the checkpoint is broken or out of reach; 6 weights are not finite; 7 verification
failed; 8 nothing can run the checkpoint here; 70 a bug of ours; 130 interrupted.
"""

from __future__ import annotations

import importlib
import sys

import click

from roundel import __version__

__all__ = ["cli", "main"]

COMMANDS = {
    "quantize": "Round a model's weights and write a checkpoint.",
    "convert": "Move a quantized checkpoint to another format.",
    "plan": "Show what quantize would do, without reading a weight.",
    "inspect": "Show what a checkpoint is.",
    "verify": "Read a written checkpoint back and compare it with its source.",
    "generate": "Continue a prompt with a checkpoint.",
    "chat": "Talk with a checkpoint.",
    "serve": "Serve a checkpoint to tools that speak OpenAI's API.",
    "list": "List schemes, formats, algorithms or families.",
    "eval": "Measure a model: perplexity, divergence from its source, tasks.",
    "compare": "Compare models: size, perplexity, divergence, speed.",
    "demo": "Quantize the bundled model and measure the result.",
}
RESUMED = (["quantize"], ["convert"])  # commands that go on where they were interrupted


class _Commands(click.Group):
    """Commands are imported when they are called; the list of them costs nothing."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"roundel.cli.{cmd_name}")
        command: click.Command = getattr(module, f"{cmd_name}_" if cmd_name in ("list", "eval") else cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        from roundel.errors import nearest

        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            raise click.UsageError(f"No such command {args[0]!r}.{nearest(args[0], COMMANDS)}", ctx)
        return super().resolve_command(ctx, args)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="roundel")
def cli() -> None:
    """Round a large language model's weights to few bits, without loading the model.

    \b
    Examples:
      roundel quantize ./Llama-3.1-8B                      W4A16, for vLLM and transformers
      roundel quantize Qwen/Qwen3-8B ./out --scheme MXFP4   straight from the Hub
      roundel convert ./gptq-model ./out --format mlx       the same numbers for another runtime
      roundel plan ./model --bits 3 --group-size 64         what would happen, how large it gets
      roundel verify ./out --against ./model                is it what it should be
      roundel eval ./out --ppl text.txt --kl-against ./model   how good it is
    """


def main() -> None:
    """Run the command line. A traceback reaches the user only for a bug of ours."""
    from roundel.errors import QuantizationError

    try:
        cli(prog_name="roundel", standalone_mode=False)
    except click.exceptions.Abort:
        _interrupted()
    except KeyboardInterrupt:
        _interrupted()
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except QuantizationError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except OSError as error:
        click.echo(f"Error: {error}. The system refused this. Mend it and repeat the same command.", err=True)
        sys.exit(1)


def _interrupted() -> None:
    kept = " What is finished is kept: repeat the same command to continue." if sys.argv[1:2] in RESUMED else ""
    click.echo(f"\nInterrupted.{kept}", err=True)
    sys.exit(130)
