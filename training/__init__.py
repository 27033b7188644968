"""The pipeline around a drafter (stages 1 and 2, evaluation) and the ``ppow`` command, one module per stage."""
