"""From what users have to rows: sources, chats and their masks, packing, preparation, vocabulary, order."""
