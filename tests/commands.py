"""Commands run through their real entry, in this process."""

from typer.testing import CliRunner, Result

from axpo import cli


def axpo(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def succeed(*arguments: object) -> Result:
    result = axpo(*arguments)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result


def mistake(*arguments: object, warned: bool = False) -> str:
    """The message of a command that a user's mistake ends, perhaps after warnings."""
    result = axpo(*arguments)
    assert (result.exit_code, type(result.exception)) == (2, SystemExit), result.output + repr(result.exception)
    told = ("error: ", "warning: ") if warned else "error: "
    assert all(line.startswith(told) for line in result.stderr.splitlines()), result.stderr
    return result.stderr
