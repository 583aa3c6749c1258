"""The axis of tokens: where it runs, and what stays as it is when the text grows."""
