"""The pipeline, a file a stage: sft -> reward -> score -> align -> evaluate -> report."""
