"""Do the stores agree? They are compared by set, and what has drifted is made anew from MongoDB."""
